"""Mechanisms by name in models that someone else wrote: `sparseattn.swap`, `sparseattn.make_cache`.

- `swapping.py`: what the person holds: a swap, its choices and its report;
- `places.py`: which swap rules which module, now;
- `transformers_route.py`: models that ask transformers for their attention function, whose masks
  stay unbuilt (`lazy_mask.py`) and whose generation may keep caches that fit (`decoding.py`);
- `sdpa_route.py`: every other model that calls torch's `scaled_dot_product_attention`;
- `dense_mask.py`, `clipped.py`: what both make of a dense mask, and of a model's own window.
"""
