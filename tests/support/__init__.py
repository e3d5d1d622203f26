"""What several tests share: stand-ins for the clock and for etcd, and their contracts."""
