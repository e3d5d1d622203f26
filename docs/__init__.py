"""The pages of the project, and the programs that write their reference and check them."""
