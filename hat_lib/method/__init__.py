"""The method: adaptive decoder layer, routers, policies, exit gates, token state, thresholds, cost, checkpoint."""
