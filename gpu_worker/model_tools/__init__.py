"""Command-line programs that work on a model's files: seeded checkpoints, hash manifests,
scores."""
