"""The expert-parallel exchange between ranks on cards."""
