"""The HTTP gateway: admission, choice of rank, stream sessions."""
