"""The exchange of tokens between ranks in a forward: its interface and its implementations."""
