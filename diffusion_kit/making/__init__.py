"""From what is asked for to a picture: a job and settings become a whole recipe, and a recipe becomes a picture.

The command line and the studio both go this way, so that the same recipe makes the same pixels in both.
"""
