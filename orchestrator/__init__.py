"""When and where runs happen: studies, their plan, Ray, MLflow and the command line."""
