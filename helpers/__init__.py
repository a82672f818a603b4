"""Helpers behind the notebooks. Data flows one way:

facts -> prompts -> traces -> scores -> mask -> edit -> attacks -> rows -> report.
"""
