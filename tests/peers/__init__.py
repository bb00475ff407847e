"""Tests against the libraries this repository must agree with, really installed and really run."""
