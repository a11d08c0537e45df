"""Run folders: what a command found out, and the model that it fitted.

runs/digits/logreg-efficientnet_lite0-0001/
  run.json            configuration, splits, every trial, scores with intervals, timings, notes
  card.json           what the model is, what it takes and what it was fitted on
  model.safetensors   what it learned, as plain arrays
  predictions.csv     one row a scored sample; of several label columns, predictions-<label>.csv
"""
