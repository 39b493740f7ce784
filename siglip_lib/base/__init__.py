"""What two or more wings must agree on: argument checks, who observes a call, what the kernels offer."""
