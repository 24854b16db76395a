"""What the demo's illustrations are made of: a pen, characters, objects, scenery. `demo/draw.py` puts them together."""
