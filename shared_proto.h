/* SPDX-License-Identifier: ((GPL-2.0-only WITH Linux-syscall-note) OR MIT) */
/*
 * shared_proto.h - the wire between sniffer.ko and user space.
 *
 * This file is its only definition. The module includes it, and cffi compiles it
 * for Python. Other languages can read it too: it is C99 over <linux/types.h>,
 * without bit fields and implicit padding. Numbers are in host byte order unless a
 * field says "network order".
 *
 * Family
 * ------
 * Generic Netlink family SNIFFER_FAMILY, version SNIFFER_VERSION. It exists only
 * in the initial network namespace. Each command, and joining a group, needs
 * CAP_NET_ADMIN in the initial user namespace (GENL_ADMIN_PERM).
 *
 *   SNIFFER_CMD_GET_INFO     do    -> SNIFFER_A_INFO (struct sniffer_info)
 *   SNIFFER_CMD_GET_COUNTERS do    -> SNIFFER_A_COUNTERS, summed over CPUs
 *   SNIFFER_CMD_SET_CONFIG   do    SNIFFER_A_BATCH, SNIFFER_A_FLUSH_MS: u32,
 *                                  each optional -> SNIFFER_A_INFO
 *   SNIFFER_CMD_FLUSH        do    sends every per-CPU batch, then answers with
 *                                  SNIFFER_A_TAILS (array of struct sniffer_tail)
 *                                  and SNIFFER_A_FLOW_TAILS (struct sniffer_flow_tail)
 *   SNIFFER_CMD_GET_SOCKET   do    SNIFFER_A_COOKIE (u64) -> SNIFFER_A_SOCKET
 *                                  and SNIFFER_A_HOLDERS; -ENOENT if unknown
 *                            dump  one message a socket, whole table
 *   SNIFFER_CMD_GET_PROCESS  dump  one SNIFFER_A_PROCESS a message
 *
 * Groups
 * ------
 *   SNIFFER_GROUP_PACKETS    SNIFFER_CMD_PACKETS, one SNIFFER_A_RECORDS each:
 *                            a struct sniffer_batch, then .count records of
 *                            .record_size bytes
 *   SNIFFER_GROUP_PROCESSES  SNIFFER_CMD_PROCESS, one SNIFFER_A_PROCESS each,
 *                            at a process's first socket use, exec and exit
 *   SNIFFER_GROUP_SNAPS      SNIFFER_CMD_SNAPS, one SNIFFER_A_SNAPS each: a
 *                            struct sniffer_batch whose .record_size is 0,
 *                            then .count struct sniffer_snap, each followed by
 *                            .caplen bytes and zeros up to a multiple of 8
 *   SNIFFER_GROUP_FLOWS      SNIFFER_CMD_FLOWS, one SNIFFER_A_FLOWS each: a
 *                            struct sniffer_flow_batch, then .count flow records
 *                            of .record_size bytes
 *
 * Records exist while somebody listens to packets or to flows. They have the
 * same sequence numbers in both groups. To change from one group to the other,
 * join the second, send FLUSH, and leave the first. Then no record is missed,
 * and none is read twice.
 *
 * Rules for readers
 * -----------------
 * 1. Refuse a batch whose .version you do not know. New fields at the end of a
 *    record do not change the version. So step by .record_size, and ignore what
 *    you do not know.
 * 2. Records of one CPU have consecutive sequence numbers. Subtract the end of
 *    that CPU's previous batch from .record_seq: exactly so many records did not
 *    reach you. Growth of .lost says for how many of these the kernel had no
 *    memory. Do not count ENOBUFS: one stands for any number of messages. A batch
 *    of flows ends at .record_seq plus the sum of its flow records' .records.
 * 3. .instance changes when the module is loaded again: start a new account.
 * 4. Identify a socket by .cookie, or by netns and tuple if the cookie is 0.
 *    Identify a process by (tgid, start_ns). Ports and pids are reused.
 */
#ifndef SHARED_PROTO_H
#define SHARED_PROTO_H

#include <linux/types.h>

#define SNIFFER_FAMILY		"sniffer"
#define SNIFFER_GROUP_PACKETS	"packets"
#define SNIFFER_GROUP_PROCESSES	"processes"
#define SNIFFER_GROUP_SNAPS	"snaps"
#define SNIFFER_GROUP_FLOWS	"flows"

enum sniffer_limits {
	SNIFFER_VERSION		= 1,
	SNIFFER_COMM_LEN	= 16,	/* TASK_COMM_LEN */
	SNIFFER_EXE_LEN		= 256,	/* a longer path keeps its tail */
	SNIFFER_CGROUP_LEN	= 256,	/* a longer path is left out */
	SNIFFER_ARGS_LEN	= 256,	/* a longer command line is cut */
	SNIFFER_PARENTS		= 8,	/* the nearest ones */
	SNIFFER_BATCH_MAX	= 252,	/* most records in a message */
	SNIFFER_BATCH_DEFAULT	= 128,	/* fills 16 KiB of pages exactly */
	SNIFFER_FLUSH_MS_MAX	= 1000,
	SNIFFER_FLUSH_MS_DEFAULT = 20,
	SNIFFER_SNAP_LEN	= 128,	/* most packet bytes in a snap */
	SNIFFER_HOW_SLOTS	= 32,
};

enum sniffer_cmd {
	SNIFFER_CMD_UNSPEC,
	SNIFFER_CMD_PACKETS,		/* multicast only */
	SNIFFER_CMD_PROCESS,		/* multicast only */
	SNIFFER_CMD_SNAPS,		/* multicast only */
	SNIFFER_CMD_GET_INFO,
	SNIFFER_CMD_GET_COUNTERS,
	SNIFFER_CMD_SET_CONFIG,
	SNIFFER_CMD_FLUSH,
	SNIFFER_CMD_GET_SOCKET,
	SNIFFER_CMD_GET_PROCESS,
	SNIFFER_CMD_FLOWS,		/* multicast only */
};

enum sniffer_attr {
	SNIFFER_A_UNSPEC,
	SNIFFER_A_RECORDS,		/* binary */
	SNIFFER_A_PROCESS,		/* struct sniffer_process */
	SNIFFER_A_SNAPS,		/* binary */
	SNIFFER_A_INFO,			/* struct sniffer_info */
	SNIFFER_A_COUNTERS,		/* struct sniffer_counters */
	SNIFFER_A_TAILS,		/* struct sniffer_tail [] */
	SNIFFER_A_SOCKET,		/* struct sniffer_socket */
	SNIFFER_A_HOLDERS,		/* struct sniffer_holder [] */
	SNIFFER_A_COOKIE,		/* u64 */
	SNIFFER_A_BATCH,		/* u32, records a batch: 1 .. SNIFFER_BATCH_MAX */
	SNIFFER_A_FLUSH_MS,		/* u32, ms: 1 .. SNIFFER_FLUSH_MS_MAX */
	SNIFFER_A_FLOWS,		/* binary */
	SNIFFER_A_FLOW_TAILS,		/* struct sniffer_flow_tail [] */
	SNIFFER_A_PAD,
};

enum sniffer_dir {
	SNIFFER_DIR_IN		= 1,	/* LOCAL_IN */
	SNIFFER_DIR_OUT		= 2,	/* LOCAL_OUT */
	SNIFFER_DIR_FWD		= 3,	/* FORWARD */
};

/*
 * How a record got its owner, or why it has none. Values below
 * SNIFFER_HOW_REASONS name a process; the others are reasons.
 */
enum sniffer_how {
	SNIFFER_HOW_CONTEXT	= 1,	/* the task that was sending it */
	SNIFFER_HOW_SOCKET	= 2,	/* owner table, by socket cookie */
	SNIFFER_HOW_INODE	= 3,	/* owner table, by socket inode */
	SNIFFER_HOW_LISTENER	= 4,	/* not accepted yet: the listener's owner */
	SNIFFER_HOW_REVERSE	= 5,	/* sent without a socket: found by its tuple */
	SNIFFER_HOW_DIAG	= 8,	/* user space: sock_diag and /proc/PID/fd */
	SNIFFER_HOW_PROC	= 9,	/* user space: /proc/net and /proc/PID/fd */
	SNIFFER_HOW_REASONS	= 16,
	SNIFFER_HOW_FORWARDED	= 16,	/* this host is not an end of it */
	SNIFFER_HOW_KERNEL	= 17,	/* a socket of the kernel's own */
	SNIFFER_HOW_NO_SOCKET	= 18,	/* nobody has such a socket */
	SNIFFER_HOW_SOCKET_GONE	= 19,	/* closed, and its owner forgotten */
	SNIFFER_HOW_PREDATES	= 20,	/* the socket is older than the module */
	SNIFFER_HOW_TABLE_FULL	= 21,	/* owner table was full */
	SNIFFER_HOW_NOT_PROBED	= 22,	/* the probes that would tell do not fire */
};

enum sniffer_flag {
	SNIFFER_F_SHARED	= 1,	/* several processes hold the socket */
	SNIFFER_F_INHERITED	= 2,	/* owner got it by fork, SCM_RIGHTS or pidfd_getfd */
	SNIFFER_F_SEEDED	= 4,	/* found in an fd table at module load */
	SNIFFER_F_DEAD		= 8,	/* owner had closed it or exited by then */
	SNIFFER_F_KERNEL	= 16,	/* kernel socket */
	SNIFFER_F_AMBIGUOUS	= 32,	/* the owner is a guess among several holders */
	SNIFFER_F_COPY		= 64,	/* another receiver of a packet that has a record */
};

/* One packet (skb), as one socket of this host sent or received it. */
struct sniffer_record {
	__u64 time_ns;		/* CLOCK_MONOTONIC */
	__u64 cookie;		/* SO_COOKIE of the socket, 0: none */
	__u64 inode;		/* inode of the socket, 0: none (not accepted, gone) */
	__u64 start_ns;		/* start_boottime of the thread-group leader */
	__u32 tgid;		/* in the initial pid namespace, 0: unnamed */
	__u32 tid;		/* thread of last use, 0: unknown */
	__u32 uid;		/* of the owner process, initial user namespace */
	__u32 creator;		/* tgid that made the socket, 0: unknown */
	__u32 netns;		/* inode of the network namespace */
	__u32 ifindex;		/* in: arrived on, out: leaves by, in that netns */
	__u32 seq;		/* low 32 bits of the sequence on this CPU */
	__u32 len;		/* bytes from the IP header on, before segmentation */
	__u16 cpu;
	__u16 gso_segs;		/* wire packets in this skb, at least 1 */
	__u16 sport;		/* host order */
	__u16 dport;		/* host order */
	__u8 family;		/* AF_INET or AF_INET6 */
	__u8 proto;		/* IPPROTO_TCP or IPPROTO_UDP */
	__u8 dir;		/* enum sniffer_dir */
	__u8 tcp_flags;		/* FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32, ECE, CWR */
	__u8 how;		/* enum sniffer_how */
	__u8 hdr_len;		/* bytes of IP and TCP or UDP headers, each segment has them */
	__u16 flags;		/* enum sniffer_flag */
	__u8 saddr[16];		/* network order; IPv4 in the first 4 bytes, rest 0 */
	__u8 daddr[16];
	char comm[SNIFFER_COMM_LEN];	/* of the thread-group leader; may lack a NUL */
};

/*
 * One for all records of a CPU that differ only in time, thread, size and TCP
 * flags. In last, time_ns, tid and seq are those of the latest record; tcp_flags
 * has all that were set; gso_segs is the sum; len is the bytes of all after
 * segmentation; hdr_len is 0. So, as in any record, the bytes on the wire are
 * len + (gso_segs - 1) * hdr_len.
 */
struct sniffer_flow_record {
	struct sniffer_record last;
	__u64 first_ns;		/* of the earliest record */
	__u32 records;		/* that it stands for, at least 1 */
	__u32 reserved;
};

/*
 * Head of a batch. Counters are of this CPU since load and were read together:
 *   packets = recorded + skipped,  record_seq + count = recorded + copies
 */
struct sniffer_batch {
	__u16 version;		/* SNIFFER_VERSION */
	__u16 record_size;	/* bytes from one record to the next */
	__u16 cpu;
	__u16 count;		/* records here */
	__u64 instance;		/* realtime ns of the module's load */
	__u64 batch_seq;	/* of this CPU, from 0 */
	__u64 record_seq;	/* of the first record here, on this CPU, from 0 */
	__u64 packets;		/* IP packets the hooks saw, up to the last one here */
	__u64 skipped;		/* of these: not recorded, all causes */
	__u64 lost;		/* records that no memory was left for */
	__u64 mono_ns;		/* when it was sent, three clocks read together */
	__u64 real_ns;
	__u64 boot_ns;
};

/* Head of a batch of flow records. The growth of both sums, less what you got, is lost. */
struct sniffer_flow_batch {
	struct sniffer_batch batch;
	__u64 wire_packets;	/* of all records up to the last one here, since load */
	__u64 wire_bytes;
};

/* Reply to FLUSH: what this CPU has sent so far. */
struct sniffer_tail {
	__u32 cpu;
	__u32 reserved;
	__u64 batch_seq;	/* of the next batch */
	__u64 record_seq;	/* of the next record */
	__u64 packets;
	__u64 skipped;
	__u64 lost;
};

/* The same for group flows. */
struct sniffer_flow_tail {
	struct sniffer_tail tail;
	__u64 wire_packets;
	__u64 wire_bytes;
};

enum sniffer_event {
	SNIFFER_EVENT_SEEN	= 1,	/* first use of a socket, or found at load */
	SNIFFER_EVENT_EXEC	= 2,
	SNIFFER_EVENT_EXIT	= 3,
	SNIFFER_EVENT_RENAME	= 4,	/* comm changed (PR_SET_NAME) */
	SNIFFER_EVENT_DUMP	= 5,	/* answer to GET_PROCESS */
};

struct sniffer_parent {
	__u32 tgid;		/* initial pid namespace, 0: no more of them */
	char comm[SNIFFER_COMM_LEN];
};

/* How a process began: at its exec, or else when it first used a socket. */
struct sniffer_start {
	struct sniffer_parent parents[SNIFFER_PARENTS];	/* real parents, the nearest first */
	__u32 args_len;		/* of the whole command line, 0: unknown */
	__u32 reserved;
	char args[SNIFFER_ARGS_LEN]; /* its beginning, each argument ends with a NUL */
};

/* A process that uses sockets. */
struct sniffer_process {
	__u64 time_ns;		/* of the event, CLOCK_MONOTONIC */
	__u64 start_ns;		/* start_boottime of the leader */
	__u64 cgroup_id;	/* cgroup v2, 0: none */
	__u32 tgid;
	__u32 ppid;		/* real parent's tgid, initial pid namespace */
	__u32 uid;		/* real uid, initial user namespace */
	__u32 pidns;		/* inode of its pid namespace */
	__u32 ns_tgid;		/* tgid as seen in there */
	__u32 event;		/* enum sniffer_event */
	char comm[SNIFFER_COMM_LEN];
	char exe[SNIFFER_EXE_LEN];	/* NUL-terminated path, empty: unknown */
	/* New at the end: empty if the message is shorter. */
	char cgroup[SNIFFER_CGROUP_LEN]; /* of cgroup_id, from the root, NUL-terminated */
	struct sniffer_start start;	/* only with SEEN and EXEC */
};

/* A socket of the owner table. */
struct sniffer_socket {
	__u64 cookie;
	__u64 inode;
	__u64 start_ns;		/* last user's */
	__u64 creator_start_ns;
	__u32 tgid;		/* last user */
	__u32 tid;
	__u32 creator;		/* tgid */
	__u32 uid;		/* last user's */
	__u32 netns;
	__u32 holders;		/* how many, can exceed those listed */
	__u16 flags;		/* enum sniffer_flag */
	__u16 sport;		/* local port, 0: not bound */
	__u8 family;
	__u8 proto;
	__u8 state;		/* TCP state, as in /proc/net/tcp */
	__u8 reserved;
	__u8 saddr[16];		/* local address, network order */
	char comm[SNIFFER_COMM_LEN];
};

struct sniffer_holder {
	__u64 start_ns;
	__u32 tgid;
	__u32 fds;		/* descriptors known to refer to it */
};

enum sniffer_probe {
	SNIFFER_PROBE_CREATE	= 1 << 0,	/* security_socket_post_create */
	SNIFFER_PROBE_BIND	= 1 << 1,
	SNIFFER_PROBE_CONNECT	= 1 << 2,
	SNIFFER_PROBE_LISTEN	= 1 << 3,
	SNIFFER_PROBE_ACCEPT	= 1 << 4,
	SNIFFER_PROBE_GRAFT	= 1 << 5,	/* accept, with the new socket */
	SNIFFER_PROBE_SENDMSG	= 1 << 6,
	SNIFFER_PROBE_RECVMSG	= 1 << 7,
	SNIFFER_PROBE_RECEIVE	= 1 << 8,	/* SCM_RIGHTS, pidfd_getfd */
	SNIFFER_PROBE_FREE	= 1 << 9,
	SNIFFER_PROBE_CLOSE	= 1 << 10,
	SNIFFER_PROBE_FORK	= 1 << 11,	/* tracepoints from here on */
	SNIFFER_PROBE_EXEC	= 1 << 12,
	SNIFFER_PROBE_EXIT	= 1 << 13,
	SNIFFER_PROBE_RENAME	= 1 << 14,
	SNIFFER_PROBE_STATE	= 1 << 15,	/* inet_sock_set_state */
	SNIFFER_PROBE_RESET	= 1 << 16,	/* tcp_send_reset */
	SNIFFER_PROBE_RELEASE	= 1 << 17,	/* inet_release: a socket's last file goes */
};

struct sniffer_info {
	__u32 version;
	__u32 record_size;
	__u64 instance;
	__u32 batch;		/* records a batch */
	__u32 flush_ms;
	__u32 max_sockets;
	__u32 sockets;		/* in the owner table now */
	__u32 processes;	/* in the process table now */
	__u32 probes_registered; /* enum sniffer_probe */
	__u32 probes_firing;	/* of these: seen to fire since load */
	__u32 canary;		/* 1: kprobes fire (self-test at load and each second) */
};

/*
 * Since load, summed over CPUs:
 *   packets = recorded + skipped_*          records = recorded + copies
 *   records = sum(by_how)                   records = sent + lost_* + only_flows
 *                                                     + those waiting in a batch
 *   flow_records = flow_sent + flow_lost + those waiting in a batch of flows
 */
struct sniffer_counters {
	__u64 packets;		/* IP packets the hooks saw */
	__u64 recorded;		/* packets with at least one record */
	__u64 copies;		/* further records of the same packet */
	__u64 skipped_listener;	/* nobody listened */
	__u64 skipped_fragment;	/* later fragments: no ports in them */
	__u64 skipped_truncated; /* headers incomplete */
	__u64 skipped_other;	/* other protocol */
	__u64 records;
	__u64 sent;		/* records handed to Netlink */
	__u64 batches;
	__u64 lost_alloc;	/* records: no memory for a batch */
	__u64 lost_batch;	/* records: Netlink took the batch for no reader */
	__u64 table_full;	/* sockets not entered in the owner table */
	__u64 process_lost;	/* process events that no memory was left for */
	__u64 wire_packets;	/* sum of gso_segs */
	__u64 wire_bytes;	/* IP bytes after segmentation */
	__u64 by_how[SNIFFER_HOW_SLOTS];
	__u64 only_flows;	/* records while nobody listened to group packets */
	__u64 flow_records;	/* records while somebody listened to group flows */
	__u64 flow_sent;	/* of these: handed to Netlink */
	__u64 flow_lost;	/* of these: no memory, or Netlink took the batch for no reader */
	__u64 flows;		/* flow records handed to Netlink */
};

/* Head of one packet's first bytes in group SNIFFER_GROUP_SNAPS. */
struct sniffer_snap {
	__u64 time_ns;
	__u32 seq;		/* with cpu: the record it belongs to */
	__u32 len;
	__u16 cpu;
	__u16 caplen;		/* bytes that follow, from the IP header on */
	__u32 reserved;
};

/* cffi reads this file too. Its parser does not know assertions. */
#ifndef SNIFFER_CDEF
#ifndef __KERNEL__
#include <assert.h>
#endif
static_assert(sizeof(struct sniffer_record) == 128, "record");
static_assert(sizeof(struct sniffer_flow_record) == 144, "flow record");
static_assert(sizeof(struct sniffer_batch) == 80, "batch");
static_assert(sizeof(struct sniffer_flow_batch) == 96, "flow batch");
static_assert(sizeof(struct sniffer_tail) == 48, "tail");
static_assert(sizeof(struct sniffer_flow_tail) == 64, "flow tail");
static_assert(sizeof(struct sniffer_start) == 424, "start");
static_assert(sizeof(struct sniffer_process) == 1000, "process");
static_assert(sizeof(struct sniffer_socket) == 96, "socket");
static_assert(sizeof(struct sniffer_holder) == 16, "holder");
static_assert(sizeof(struct sniffer_info) == 48, "info");
static_assert(sizeof(struct sniffer_counters) == 16 * 8 + 32 * 8 + 5 * 8, "counters");
static_assert(sizeof(struct sniffer_snap) == 24, "snap");
#endif

#endif /* SHARED_PROTO_H */
