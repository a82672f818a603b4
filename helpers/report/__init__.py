"""One page from stored rows alone: verdicts, the paper's figures redrawn, the worst case by method and mask, and where it all comes from.

    python -m helpers.report --rows data/results --out runs/report
"""
