"""Training routers, then exit gates, to imitate the frozen base."""
