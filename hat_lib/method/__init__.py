"""The method. Read it in this order: routers, thresholds, setting, trace, forward, layer."""
