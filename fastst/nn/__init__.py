"""Modules that users put into their models."""
