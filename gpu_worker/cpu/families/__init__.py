"""The model families that are served, one file each. `shared.model_spec.ARCHITECTURES` says whose
file is which."""
