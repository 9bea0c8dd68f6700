"""From the bytes of a file to pixels: formats, one rule of what a pixel means, two decoders."""
