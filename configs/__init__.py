"""Recipes for `mpt fit`: `mpt configs` lists them."""
