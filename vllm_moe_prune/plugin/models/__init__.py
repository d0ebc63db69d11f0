"""vLLM model classes: one file per family, named after its ``model_type``."""
