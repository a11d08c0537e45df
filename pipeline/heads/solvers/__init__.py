"""How heads are fitted: many problems on one X, together.

design    centred features in their eigenbasis, made once
losses    softmax, logistic and squared hinge: value, slope, curvature
newton    many problems, one Newton step after the other, each at its own pace
path      a grid of penalties, folds and targets: from few points to all
linear    fit_logistic, fit_svm
proximal  logistic regression with L1 or elastic net
ridge     fit_ridge: every penalty and exact leave-one-out in closed form
mlp       networks and softmax layers: many members, one program
"""
