"""Weights in and out: the MAE checkpoint layout, timm's ViT keys."""
