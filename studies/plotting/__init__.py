"""The figures and verdicts that come from saved results."""
