"""A real Kubernetes on a bare Linux machine, from Go modules and Debian packages."""
