"""Prediction over files with trained models, and evaluation of Chinese and English answers."""
