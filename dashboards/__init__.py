"""What came out: tables and pages from records on disk and from MLflow; never trains, never loads torch."""
