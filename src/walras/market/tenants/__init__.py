"""Clearing across tenants: economies of tenants and activities, their equilibria, and what proves them. [Z-GE]"""
