"""The admin API of a control plane: what people and orchestrators ask of a running instance."""
