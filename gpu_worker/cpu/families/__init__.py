"""The model families that are served, one file each. `shared.model_spec.ARCHITECTURES` maps an
architecture to its file."""
