"""Runs what training made: prediction over files, evaluation of Chinese and English answers."""
