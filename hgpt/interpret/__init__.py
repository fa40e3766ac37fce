"""What a trained model's geometry says: measures as pure functions of arrays, and a report of any number of models.

python -m hgpt.interpret runs/harmonic runs/softmax --data data/python_docs --out report/
"""
