"""``import depass_fast.compat.install``: from then on ``import DePass`` means this package, for workers too.

It also bridges what newer packages broke (:mod:`.bridges`).
"""

from .stand_in import stand_in

stand_in()
