"""The former name of `hat_lib.evaluation.controls`, for the notebooks that import it."""

from hat_lib.evaluation.controls import Layers, RandomExits, as_in, exit_shares, matched, random_mask  # noqa: F401
