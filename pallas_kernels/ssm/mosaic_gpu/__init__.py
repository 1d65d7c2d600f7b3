"""The op's forward pass in Pallas Mosaic GPU, for Hopper (wgmma): `phase`, the angles, then `scan`, all the rest."""
