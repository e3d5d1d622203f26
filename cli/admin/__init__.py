"""Commands that change a running instance on purpose, through its control planes' admin API."""
