"""Routers, then exit gates, by imitating the frozen base."""
