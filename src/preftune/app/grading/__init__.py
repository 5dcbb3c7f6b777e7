"""Evaluations of rows: answers compared, scored, classified or checked by graders and judges."""
