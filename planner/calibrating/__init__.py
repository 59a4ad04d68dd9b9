"""This machine's calibration: a few short measurements of small models made on the spot, kept and refined by every run.

`taking` measures, `keeping` keeps the measurements, fits the machine's laws to them and to those of runs
(cost_models/laws.py) and lays the laws on the machine's profile, `telling` says what came out.
"""
