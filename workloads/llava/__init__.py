"""The LLaVA model, in the order data flows."""
