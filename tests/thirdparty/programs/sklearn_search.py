"""scikit-learn fits in processes of Fiber, where joblib is told to make them so."""

import joblib.parallel
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import fiber


def search(**where):
    images, digits = load_digits(return_X_y=True)
    found = GridSearchCV(SVC(), {"C": [0.01, 10], "gamma": [0.001, 1]}, cv=3)
    with joblib.parallel_config(**where):
        return found.fit(images[:600], digits[:600])


if __name__ == "__main__":
    joblib.parallel.DEFAULT_MP_CONTEXT = fiber.get_context("spawn")
    together = search(backend="multiprocessing", n_jobs=2)
    alone = search(n_jobs=1)
    scores = "mean_test_score"
    print("same:", np.array_equal(together.cv_results_[scores], alone.cv_results_[scores]))
    print("best:", together.best_params_)
