"""Programs beside the services that work on a model's files."""
