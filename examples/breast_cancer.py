"""Write the breast cancer table that scikit-learn ships as a CSV file: python examples/breast_cancer.py OUT.csv"""

import csv
import sys

from sklearn.datasets import load_breast_cancer


def main(path: str) -> None:
    data = load_breast_cancer()
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*data.feature_names, "diagnosis"])
        for row, target in zip(data.data.tolist(), data.target, strict=True):
            writer.writerow([*row, data.target_names[target]])
    print(f"{path}: {len(data.data)} patients, {len(data.feature_names)} measurements, malignant or benign")


if __name__ == "__main__":
    main(sys.argv[1])
