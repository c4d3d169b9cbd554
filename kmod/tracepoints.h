/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_TRACEPOINTS_H
#define SNIFFER_TRACEPOINTS_H

#include <linux/types.h>

u32 sniffer_tracepoints_init(u32 refuse);
void sniffer_tracepoints_exit(void);

#endif /* SNIFFER_TRACEPOINTS_H */
