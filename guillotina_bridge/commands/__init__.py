"""Commands of guillotina's program ``g``."""
