// A segment's record in a RoutePlan (tables/routes.py).
#pragma once

#include "product.h"

namespace tucka {

enum Column { IDS, COUNT, TABLE, GROUPS, EXPERTS, C, G, LINEARS, MODULES, SLICES, RANK, CORE, COLUMNS };

struct Record {
  const int64_t* columns;
  Record(const Tensor& records, int64_t s) : columns(records.const_data_ptr<int64_t>() + s * COLUMNS) {}
  int64_t operator[](Column c) const { return columns[c]; }
  template <class T>
  const T* at(Column c) const {
    return reinterpret_cast<const T*>(columns[c]);
  }
};

}  // namespace tucka
