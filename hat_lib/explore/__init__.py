"""The two calls people look for first, ``hat.sweep(text)`` and ``hat.explain(prompt)``: measured and drawn."""
