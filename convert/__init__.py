"""Entry points `python -m convert.from_hf` and `python -m convert.to_hf`.

The code is in `ovis_jax.conversion`, because a convert.py in the user's folder would shadow this
package.
"""
