"""The method. Read it in this order: routers, grain, thresholds, setting, trace, forward, layer."""
