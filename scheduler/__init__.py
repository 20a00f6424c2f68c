"""Which tokens are computed next: requests, sampling parameters, step plans and the scheduler."""
