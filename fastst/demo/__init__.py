"""A network on a real clip, before and after conversion: ``python -m fastst.demo``."""
